"""What surrounds a training run: what can be wrong before it, what is kept of it, how it goes on. For whose run broke.

The step itself stands in train.py, samples and rows in utils.py.

In the order of a run:

    arguments.py       what is wrong with the flags or the DeepSpeed file
    processes.py       how processes meet, what precision the device has; which signals stop a run
    fused_lora.py      LoRA's layers in few operations
    one_parameter.py   all adapters as one parameter, for DeepSpeed
    trial.py           the largest rows pass before the first step: peak memory, time and disk
    log.py             TensorBoard and the progress bar
    sample_answers.py  answers to the same questions at every save
    checkpoints.py     the adapters and states of a run, and which adapter is the best one
    resume.py          what an interrupted run needs to go on, bit for bit
    run_record.py      what is said of a run, and kept to repeat it
"""
