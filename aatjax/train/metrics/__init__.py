"""Classification metrics with confidence intervals."""
