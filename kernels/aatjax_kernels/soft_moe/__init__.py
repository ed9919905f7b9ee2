"""Soft mixture of experts: dispatch, experts, combine."""
