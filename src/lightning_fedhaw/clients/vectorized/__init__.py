"""Many clients at once, as stacks of parameters in batched calls of the user's ``training_step``.

To read in this order: ``engine`` trains a cohort in chunks; a ``chunk`` stacks its clients and plans the calls; a
``batched`` step is one call, through ``torch.func.vmap``, inside a ``guard`` (dropout masks, embeddings) and with a log
``recorder`` of its own; ``optimizers`` steps the stacks; ``compiled`` runs a batched step as a graph. Whether a module
can be trained like this is found out by a ``trial``, with a ``snapshot`` of what a step can reach, ``fingerprint`` (has
a value changed?), ``tracing`` (by which line?) and ``comparison`` (does each client get what it gets alone?).
"""
