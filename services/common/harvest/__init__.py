"""What `Harvest` gathers of components: the state it answers, how two are merged, what they say.

Plain numpy, for both sides of the call: the inference service gathers on the device and sends a
state, the dataset service merges the states of segments and reads records off them.
"""
