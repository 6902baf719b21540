"""Dialogues and roles as people write them, read and checked. For who brings dialogues of their own.

Whatever the form of a file, a sample comes out in one shape:

    {"role": "李白", "system": "你就是李白本人。…", "messages": [
        {"role": "user", "content": "饮酒否？"}, {"role": "assistant", "content": "将进酒，杯莫停。"}]}

Its assistant's turns are learned, but for those that carry "train": False. `RoleDataset` in utils.py turns samples into
token ids. The wording of a persona, the system text, is data_helper.py's.

In the order of reading:

    samples.py      all forms of samples and conversations, and RoleBench's own lines; messages for the model
    profiles.py     who the roles are: the file of profiles
    cards.py        character cards, as other programs for role-play exchange them
    json_files.py   JSON and text in UTF-8, with errors that name the line
    show.py         samples printed as the model reads them, for data_helper.py --show
"""
