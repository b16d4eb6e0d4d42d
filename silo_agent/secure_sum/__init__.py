"""Between an update and a sum: numpy only. What every silo computes here must be the same to the bit everywhere."""
