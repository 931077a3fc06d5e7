"""What makes two things the same: values, code, networks, datasets. Every station may import it."""
