"""The engine: sequences, blocks, slots, the scheduler, and the thread that runs steps."""
