"""How far apart two computations of one number may lie, and why just so far. Relative, unless it says otherwise.
Float32 has 2^-24 = 6e-8 relative error an operation; sums in another order (other ranks, micro-batches, ZeRO files, or
a plain loop's one large batch) differ by that, and the steps of a run carry it along."""

#: losses over the steps of a tiny run: 30 times a rounding; the largest seen in the sweep is 1.6e-7
LOSS_TOLERANCE = 2e-6
#: gradient norms: a square root of a sum over all weights of values that differ by more than their sum does
NORM_TOLERANCE = 1e-5
#: weights, as a share of what one step may move them (the learning rate): AdamW divides the gradient by its own size,
#: so where a gradient is nearly nothing its rounding is scaled up to a step
WEIGHT_TOLERANCE = 0.05
#: the validation loss over ranks, batches and orders: rows are summed apart and exactly, so only padding moves one;
#: seen: 0 with blocks, 3e-8 with completions
EVAL_TOLERANCE = 2e-7
#: losses of an int8 base between ZeRO files: a last bit of an input can turn into another of 255 codes; seen: 3.2e-5
INT8_TOLERANCE = 1e-4
#: beside Hugging Face's Trainer over 60 steps: wider than rounding, far below a wrong setting
TRAINER_LOSS_TOLERANCE, TRAINER_NORM_TOLERANCE, TRAINER_EVAL_TOLERANCE = 1e-5, 1e-4, 1e-6
#: memory by count against the growth of a real process, whose allocator rounds up and keeps pages
MEMORY_TOLERANCE = 0.2
