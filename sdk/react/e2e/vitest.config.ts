import { defineConfig } from 'vitest/config';

// One browser and one daemon for all: nothing here runs beside anything else.
export default defineConfig({
  test: {
    root: import.meta.dirname,
    include: ['*.test.ts'],
    fileParallelism: false,
    testTimeout: 90_000,
    hookTimeout: 90_000,
    reporters: ['verbose'],
  },
});
