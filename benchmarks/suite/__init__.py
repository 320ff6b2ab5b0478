"""Compares dtrain with plain Keras, hand-written Horovod and MultiWorkerMirroredStrategy: `python -m benchmarks.suite`.

Each row is a piece of work. Its contenders, alive side by side in processes of their own, do a block of it in turn,
there and back (A B B A), so that what disturbs the machine disturbs all of them; a ratio is taken in every round. The
first of the two blocks that a contender does in a round, divided by the other, is the noise. Before anything is timed
all contenders train from the same weights on the same mini-batches, and must end where one plain Keras process does.
"""
