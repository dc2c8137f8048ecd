"""Harvesting: what makes components fire over many sequences, gathered on the device.

groups        which components, and how many bytes their state takes
watching      a forward pass without logits that hands over activations and keeps none
moments, counts, kept, token_sums   the parts of a group's running state
scratch       memory that these work in
gathering     a group's running state
harvest       a whole harvest, batch by batch
"""
