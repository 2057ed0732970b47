"""Takes bills from their queue; what it cannot understand goes to quarantine."""

import sys

import transaction

from postoffice import open_queue

with open_queue(sys.argv[1], "billing") as queue:
    while queue:
        message = queue.pop_next()
        try:
            number, amount = message["Subject"].removeprefix("Bill ").split(": EUR ")
            print(f"bill {number}: {float(amount):8.2f} EUR from {message['From']}")
        except ValueError:
            transaction.abort()
            queue.quarantine(message, sys.exc_info())
        transaction.commit()
