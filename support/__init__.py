"""What keeps a run safe and a user informed. May be skipped on a first reading: the model would run without it.

The ground, on which every script stands:

    errors.py         a user's mistake becomes one line and exit status 2
    files.py          files and directories that are whole or absent; files of settings; fingerprints
    device.py         which device computes, whether it can, and what a row costs there
    command_line.py   flags with their help, and files of flags

The rooms. Each imports the ground and the rooms listed before it. The last three import utils.py, too, and never each
other (tests/test_house.py):

    dialogues/        what people write: samples, conversations, profiles, character cards
    model/            a model directory, opened and checked; weights, adapters, batches of answers
    training/         what surrounds a training run: processes, memory, logs, resuming
    scores/           what predict.py measures
    page/             the chat page, behind its layout
"""

import logging

# At its import it warns where a kernel is not there that it would fetch from the network.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
