"""What targets share about kernel rules and schedule rules."""
