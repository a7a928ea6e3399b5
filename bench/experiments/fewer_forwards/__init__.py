"""Experiment: step rules that may need fewer forwards for the same accuracy, each replayable from scalars alone.

methods.py      the rules as data: what differs from the two-point step
problem.py      model, mask and examples: the loss as a function of the masked weights
trial.py        one rule, one learning rate, one seed: its score against forwards
search.py       the learning rate of each rule, with the same number of trials for each
experiment.py   the command's tables and figure
__main__.py     some of the rules in a process of their own, and results of several processes put together

It works on the masked weights as one float32 vector, in plain torch. It is for finding out what is worth implementing:
nothing here is part of the formats, and a rule that wins gets a specification and kernels of its own.
"""
