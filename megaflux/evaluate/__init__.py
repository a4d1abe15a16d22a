"""Evidence: what a run or an export does on pictures that it never trained on."""
