"""Comparisons of hsbackend with its peers: problems, contestants, judge and experiments.

    python -m hsbackend.comparisons speed       # problems x contestants: correctness first, then time
    python -m hsbackend.comparisons speed --suite families   # named polyhedra, also against size and batch
    python -m hsbackend.comparisons qp          # QP solvers on published families: solved or not, then time
    python -m hsbackend.comparisons degenerate  # gradients at degenerate points, and training through them
    python -m hsbackend.comparisons accuracy    # what is attained for which dtype and conditioning
    python -m hsbackend.comparisons portfolio   # an end-to-end portfolio network on S&P 500 prices, once per backend

The parts know as little of each other as possible: a problem (`problems`) does not know who solves it, a contestant
(`contestants`, `projections`) does not see how it is judged, the judge (`truth`, `judge`, `reference`, `closed_forms`)
sees numbers only and imports none of the code under test.
"""
