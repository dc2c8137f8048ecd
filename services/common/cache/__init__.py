"""Answers kept for whoever asks the same again: in this process, or in a Redis shared by many.

A cache is never needed: whatever is wrong with it costs milliseconds and a computation.
"""
