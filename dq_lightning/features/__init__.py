"""First step of the method: make features of images or texts with an encoder, which is also chosen here."""
