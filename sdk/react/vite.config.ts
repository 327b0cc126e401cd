import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vitest/config';

// With BUILT=1 the tests of the client run against what is shipped.
const built = {
  find: /^.*\/src\/client\/index\.js$/,
  replacement: fileURLToPath(new URL('dist/client.js', import.meta.url)),
};

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
      // The client is a file of its own, which the hooks import too.
      preserveEntrySignatures: 'allow-extension',
    },
  },
  test: {
    alias: [
      { find: /^tornado-bcast-react(?=\/|$)/, replacement: `${import.meta.dirname}/src` },
      ...(process.env.BUILT ? [built] : []),
    ],
    include: process.env.BUILT
      ? ['test/{connection,publish,subscribe,token,vectors}.test.ts']
      : ['test/**/*.test.{ts,tsx}'],
    restoreMocks: true,
    testTimeout: 10_000,
  },
});
