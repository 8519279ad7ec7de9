"""What a block does to a vector: linear maps, spectra and angles, from weights alone."""
