"""Sound in, features out: decoding, the log-mel front end and augmentation."""
