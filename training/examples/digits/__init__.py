"""Images: the UCI digits as PGM files, a small convolutional network."""
