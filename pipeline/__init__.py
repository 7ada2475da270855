"""Where the work runs and how much of it: the graph, the plan, the ledger and the results.

The only package that imports ray. Start with `pipeline/graph.py`.
"""
