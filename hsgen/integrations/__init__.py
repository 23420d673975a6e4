"""hsgen inside the libraries that run models; each module here loads one of them, and nothing else does."""
