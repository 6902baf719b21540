"""Did training work? What predict.py measures, and train.py while it trains: one shape, one table. For who evaluates.

A measure gives each of its items (an answer, an attack, a paragraph) a number and a weight, and says of which role,
kind, round and cluster the item is. From that `table.py` makes all means, intervals and differences.

In the order of reading:

    table.py        what a measure is; means, bootstrap intervals, paired differences, and the table that is printed
    answers.py      answers beside the recorded ones: ROUGE-L, catchwords, distinct-2, whether they end, style and copies
    voice.py        whose voice an answer has, and whether it is more than a training answer recited
    persona.py      "who said it", and what the persona is worth, from the model's own likelihoods
    in_role.py      attacks that try to break a role, and questions about what it cannot know
    likelihood.py   how likely a model finds given texts; also the perplexity of plain text
    candidates.py   the models of one comparison, their weights, and their answers on disk
    report.py       the report for a browser, whose form is report.html
    texts.json      what is shown, a line a text: [English, Chinese]
"""
