"""Exact unlearning of noisy SGD by total-variation stability, and what it is to be compared with.

Read `problem` and `chains` (learn, delete, insert and the proof) first, then `state`, which serves requests on a file.
`evidence` tests exactness, `compare` has the other methods, `experiments` is what notebook 06 runs.
"""
