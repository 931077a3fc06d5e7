"""Texts and digests that differ if values, code, networks or datasets differ. All stations may import this folder."""
