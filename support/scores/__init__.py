"""Did training work? What predict.py measures, and train.py while it trains: one shape, one table. For who evaluates.

A measure gives each of its items (an answer, an attack, a paragraph) a number and a weight, and says of which role,
kind, round and cluster the item is. From that `table.py` makes all means, intervals and differences. Read it first, then
the measures: answers.py with voice.py, persona.py, in_role.py, likelihood.py; then candidates.py, the models that are
compared, and report.py with its form report.html. What is shown stands in texts.json.
"""
