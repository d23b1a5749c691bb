"""What a run will take, reported before it starts: steps, FLOPs, memory, hours and money.

planned_runs.py  a recipe -> the model, the rows and the steps of the run it describes
computing.py     a planned run and a device -> its plan
plan.py          the plan: figures, whether it fits, advice
table.py         plans in the terminal
plans.py         `minimind plan`: several recipes, as tables or as JSON
measuring.py     a few real steps in place of an assumption
"""
