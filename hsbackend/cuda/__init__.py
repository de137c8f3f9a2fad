"""The named polyhedra on CUDA tensors, in Triton.

One module per family with the two functions of :mod:`hsbackend.families.family`, on tensors instead of arrays:
:mod:`~hsbackend.cuda.budget` (the l1 ball too), :mod:`~hsbackend.cuda.monotone`, :mod:`~hsbackend.cuda.transport`.
:mod:`~hsbackend.cuda.dispatch` chooses between a kernel and, beyond the sizes of the kernels, plain torch operations on
the device. Nothing here is imported before a CUDA tensor arrives, and nothing here waits for the device.

Kernels compute in float64 whatever the dtype of the data, as the compiled loops of the CPU do: on the devices this is
written for (sm_80, sm_90, sm_100) float64 runs at half the rate of float32, and faces are decided to the same rounding.
"""
