import { defineConfig } from 'vitest/config';

// The library: one file for each entrance, and what they share. See scripts/build.js for the rest.
export default defineConfig({
  build: {
    target: 'es2022',
    minify: false,
    lib: {
      entry: { index: 'src/index.ts', client: 'src/client/index.ts', testing: 'src/testing/index.ts' },
      formats: ['es'],
    },
    rollupOptions: {
      external: /^react/,
      output: { chunkFileNames: 'shared/[name].js' },
    },
  },
  test: {
    alias: [{ find: /^tornado-bcast-react(?=\/|$)/, replacement: `${import.meta.dirname}/src` }],
    include: ['test/**/*.test.{ts,tsx}'],
    restoreMocks: true,
    testTimeout: 10_000,
  },
});
