"""Many clients at once, as stacks of parameters in batched calls of the user's ``training_step``.

To read in this order: ``engine`` trains a cohort in chunks; a ``chunk`` stacks its clients and plans the calls; a
``batched`` step is one call, through ``torch.func.vmap``, with ``dropout`` masks and a log ``recorder`` of its own;
``optimizers`` steps the stacks; ``compiled`` runs a batched step as a graph. Whether a module can be trained like this
is found out by a ``trial``, with ``fingerprint`` (has an attribute changed?), ``tracing`` (by which line?) and
``comparison`` (does each client get what it gets alone?).
"""
