"""What comes out: the demo's story, and what a sidecar says of its model.

| file          | what it does                                                            |
|---------------|-------------------------------------------------------------------------|
| `tasks.py`    | real texts and a real model, read from installed packages                |
| `finetune.py` | one model folder and one task to one specialist's folder                 |
| `evaluate.py` | a saved classifier's score on held-out examples, and paired differences  |
| `heads.py`    | one model's body under another model's head                              |
| `frontier.py` | two models merged in memory with many lambdas, to choose among           |
| `report.py`   | one table, one picture                                                   |
| `demo.py`     | the story, in the commands that a user would type                        |
| `mass.py`     | where in a model its precision lies                                      |
| `factors.py`  | what factors say of a model's layers                                     |
| `plots.py`    | pictures of all that                                                     |
"""
