"""What tasks' own functions may do beside their work."""

import logging
import warnings


def process_docs(docs):
    print("printed")
    warnings.warn("warned of", stacklevel=1)
    logging.getLogger("task").error("logged")
    return docs
