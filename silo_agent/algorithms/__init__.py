"""Every algorithm is: what a silo changes in its local training, what it adds to the sum, and how the sum moves the state.

One file each, numpy only. `fedavg.FedAvg` is the interface, and what the others change nothing of. A step is what every silo
computes alike (secure-sum.md section 6): float64, elementwise + - * / sqrt only, one ufunc at a time, in the order written.
"""
