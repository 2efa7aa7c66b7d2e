"""What keeps the engine serving: full queues, too little memory, steps that fail, steps that do not end."""
