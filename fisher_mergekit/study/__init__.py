"""Floor 4: what comes out. Fine-tune, evaluate and report; `demo.py` tells the whole story.

| file          | what it does                                                          |
|---------------|-----------------------------------------------------------------------|
| `tasks.py`    | real texts and a real model, read from installed packages              |
| `finetune.py` | one model folder and one task to one specialist's folder               |
| `evaluate.py` | a saved classifier's score on held-out examples, and paired differences |
| `heads.py`    | one model's body under another model's head                            |
| `report.py`   | one table, one picture                                                 |
| `demo.py`     | the story                                                              |

Nothing here measures or merges: it calls the commands that a user would type.
"""
