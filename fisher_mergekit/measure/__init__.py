"""From a model and its calibration data to its precisions.

The way of the data:

    job.py           what is asked for, and whether it has been measured already
    precompute.py    a job -> its sidecar
    sources/         … by passes over data, or of what an optimizer kept
    calibration.py   rows of a data set -> texts, pictures and labels
    labels.py        … labels -> numbers
    images.py        … pictures -> pixels
    encoding.py      rows -> examples, by the model's tokenizer or image processor
    batches.py       examples -> padded batches
    limits.py        how large a batch may be
    subject.py       a checkpoint -> the model, and what of it is which tensor in its files
    adapter.py       … and a PEFT adapter in the model that it was trained on
    session.py       the loop that joins them
    measured.py      what comes out of it
    stored.py        what was measured -> what a sidecar holds of a kind
    dividing.py      … factors of a parameter -> factors of the tensors that it was made of

What is differentiated:

    likelihoods/     logits -> the score of an outcome: what log p(y|x) is for this head
    estimators/      where y comes from: exact, sampled, empirical
    units/           whose gradient is squared whole: an example's, a token's
    causality.py     whether a language model sees the tokens that it predicts
    passes.py        a batch's forward pass, and where its backward passes begin
    scaling.py       … with gradients that float16 can hold
    checkpointing.py … with activations that are computed again
    plain.py         one example alone, by plain autograd

How each example's gradient is had of one pass over many:

    taps.py          a model's passes with its modules tapped
    ladder.py        which way each parameter is measured, and who is asked when one fails
    verification.py  … compared with plain autograd on the model at hand
    probe.py         … on which examples, and how closely
    tapped.py        one module that is tapped
    sites.py         where a layer's inputs and output gradients are taken
    layers/          those -> what each example adds
    axes.py          where the examples are in a tensor
    contributions.py what each example adds -> squares, never written down
    kernels/         … of products, on GPUs
    squares.py       their sums: the diagonal Fisher
    factors.py       the sums of Kronecker factors
    inputs.py        … of what goes into a linear layer
    readings.py      … which tokens its rows are
    groups.py        … of layers that get the same inputs
    listening.py     passes that measure factors and nothing else
"""
