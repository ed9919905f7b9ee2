"""From sound files to features: decoding, the log-mel front end and augmentation."""
