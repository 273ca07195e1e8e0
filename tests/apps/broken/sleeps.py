"""Its import does not come to an end."""
import time

time.sleep(1000)
