"""Adapters: one module per host ecosystem, the only places that know its signs, axes and storage."""
