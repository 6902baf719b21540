"""What keeps a run safe and a user informed. May be skipped on a first reading: the model would run without it."""

import logging

# At its import it warns where a kernel is not there that it would fetch from the network.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
