"""Who calls: keys of requests, what each route asks of them, and what they see."""
