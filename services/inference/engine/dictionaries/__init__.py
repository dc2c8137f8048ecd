"""Dictionaries: sparse autoencoders and transcoders, from published files to one canonical form.

`sources` turns URIs into registered dictionaries, one reader per file format; `dictionary` is the
form all of them end in; `store` keeps weights on the device; `self_test` says whether a dictionary
belongs where it was put.
"""
