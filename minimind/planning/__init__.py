"""What a run will take, said before it starts: parameters, tokens, FLOPs, memory, hours and money.

costs.py     the arithmetic: what one step of a model computes and holds
devices.py   what a device can do: a table, or a measurement
recipes.py   a recipe -> the model, the rows and the steps of the run it describes
plans.py     all of it together, as an object and as tables
measuring.py a few real steps, and the comparison of a run with its plan
"""
