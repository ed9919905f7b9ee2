"""Benchmarks of the methods: FLOPs, memory and time, counted and measured the same way for all."""
