"""Named polyhedra with exact algorithms of their own: budget (simplex), l1 ball, monotone chains, transport.

One module per family, each with the same two functions, ``solve`` and ``kkt`` (:mod:`hsbackend.families.family`), on
NumPy arrays, float32 or float64. Beside each stands a twin in plain PyTorch, ``<family>_naive``, slow and obviously
right: the truth in the tests.
"""
