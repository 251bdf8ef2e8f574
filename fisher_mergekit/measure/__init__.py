"""Floor 3a, the laboratory: from a model and its calibration data to its precisions.

The way of the data, one room each:

    calibration.py   rows of a data set -> texts and labels
    batches.py       texts -> token ids -> padded batches
    subject.py       a checkpoint -> the model, and what of it is which tensor in its files
    adapter.py       … and a PEFT adapter in the model that it was trained on
    likelihoods/     logits -> the score of an outcome: what log p(y|x) is for this head
    estimators/      where y comes from: exact, sampled, empirical
    taps.py          which way each parameter is measured, and who is asked when one fails
    axes.py          where the examples are in a tensor
    layers/          a layer's inputs and output gradients -> what each example adds
    contributions.py … squared example by example, and summed
    session.py       the loop that joins them
    stored.py        what was measured -> what a sidecar holds of a kind
    job.py           what is asked for, and whether it has been measured already
    precompute.py    a job -> its sidecar
"""
