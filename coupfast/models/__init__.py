"""Score networks and classifiers, their weight files, and the names they are loaded by."""
