"""Solvers, one module per algorithm: values of a batch and options in, a :class:`~hsbackend.solvers.result.Result` out.

Laws every solver keeps, each with a test: item i of a batch equals item i alone; ``SOLVED`` means the KKT residual
computed from the data is within the tolerance; the index set of the face lies between the support of the multipliers
and the active rows; redundant, duplicated, dependent and empty rows are normal input.
"""
