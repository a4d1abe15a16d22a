"""What every bench shares: report.py (rows, JSON, resuming), timing.py (samples, limits), machine.py (what ran)."""
