"""Our merge methods inside plain `mergekit-yaml`.

    install.py    registers the methods, and wraps mergekit's planning and its model card
    method.py     the object that mergekit's registry holds: parameters, and a refusal
    planner.py    from mergekit's planner to tasks: record its walk, check, build
    walk.py       the record of mergekit's walk
    command.py    which of mergekit's commands runs, and on which recipe's file
    files.py      a model's tensors, and what transformers makes of them while loading
    slots.py      an output tensor and the models' tensors that go into it
    settings.py   lambda and the method's parameters, resolved for one output tensor
    checks.py     what is wrong with a recipe and its tensors
    output.py     what is wrong with the model that would be written
    vocabulary.py the output's tokenizer, and what the recipe says of tokens
    depth.py      how many layers a sliced recipe makes, and what the output's config says of them
    exclude.py    which tensors the recipe keeps out, and which it should
    sidecars.py   the models' sidecars: found, opened, checked
    remedies.py   the commands that measure what is missing, for messages
    priors.py     base_model's own Fisher, where it is a prior
    pieces.py     what is put together while loading, as it is in the files
    ways.py       by which kind each tensor is merged, and the kinds' scales
    build.py      from ways to tasks; layers that share their inputs
    aligning.py   tasks: tables of tokens, and what was measured of them, brought in line
    planned.py    what planning has opened, for the tasks
    side_by_side.py  calls in several threads
    loading.py    mergekit graph tasks that load: thetas, precisions
    tasks.py      mergekit graph tasks that merge them, put together, copy
    card.py       the merged model's README.md: what was measured of each model

A merge is planned like this: mergekit's own walk over modules, slices and layers is recorded
instead of turned into tasks; the record is checked, every problem at once, before any weight is
merged; then the tasks are built. A statistic is looked up by the *source* tensor's name in its
model's files, so layers that change places take their own statistics with them.
"""
