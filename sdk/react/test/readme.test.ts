/** README.md: its code is right, and it has every option with its default. */
import { readFileSync } from 'node:fs';
import { resolve } from 'node:path';
import ts from 'typescript';
import { describe, expect, it } from 'vitest';

const ROOT = resolve(import.meta.dirname, '..');
const README = readFileSync(resolve(ROOT, 'README.md'), 'utf8');

describe('the code', () => {
  const blocks = [...README.matchAll(/```(tsx?)\n(.*?)```/gs)].map(([, kind, code], index) => ({
    name: resolve(ROOT, `test/readme-${index}.${kind}`),
    code: `${code}\nexport {};\n`,
  }));

  it('has types that fit', () => {
    const { config } = ts.readConfigFile(resolve(ROOT, 'tsconfig.json'), ts.sys.readFile);
    const { options } = ts.parseJsonConfigFileContent({ ...config, include: [] }, ts.sys, ROOT);
    const host = ts.createCompilerHost(options);
    const { fileExists, getSourceFile } = host;
    const texts = new Map(blocks.map(({ name, code }) => [name, code]));
    host.fileExists = (name) => texts.has(name) || fileExists(name);
    host.getSourceFile = (name, version) => {
      const text = texts.get(name);
      return text === undefined ? getSourceFile(name, version) : ts.createSourceFile(name, text, version);
    };
    const program = ts.createProgram([...texts.keys()], options, host);
    const found = ts.getPreEmitDiagnostics(program);
    expect(found.map(({ file, messageText }) => [file?.text.slice(0, 200), messageText])).toEqual([]);
    expect(blocks.length).toBeGreaterThan(6);
  }, 60_000);

  it('for testing an app is a test that runs', () => {
    const recipe = readFileSync(resolve(ROOT, 'test/react/recipe.test.tsx'), 'utf8');
    expect(README).toContain(recipe.split('// From here on as in the README.\n')[1]);
  });
});

describe('the options', () => {
  /** Of each property its name, and its default where the JSDoc has one. */
  function options(file: string, name: string): [string, string | undefined][] {
    const path = resolve(ROOT, file);
    const source = ts.createSourceFile(path, readFileSync(path, 'utf8'), ts.ScriptTarget.Latest, true);
    const found = source.statements.find(
      (one): one is ts.InterfaceDeclaration => ts.isInterfaceDeclaration(one) && one.name.text === name,
    );
    if (!found) throw new Error(`${file} has no interface ${name}`);
    return found.members.map((member) => {
      const tag = ts.getJSDocTags(member).find(({ tagName }) => tagName.text === 'default');
      return [(member.name as ts.Identifier).text, tag && String(ts.getTextOfJSDocComment(tag.comment))];
    });
  }

  it.each([
    ['src/types.ts', 'ClientOptions', ''],
    ['src/types.ts', 'ReconnectOptions', 'reconnect.'],
    ['src/types.ts', 'QueueOptions', 'queue.'],
    ['src/types.ts', 'PublishOptions', ''],
    ['src/types.ts', 'SubscribeOptions', ''],
    ['src/react/use-subscription.ts', 'UseSubscriptionOptions', ''],
  ])('of %s, %s, are all there with their defaults', (file, name, prefix) => {
    for (const [option, value] of options(file, name)) {
      const row = README.split('\n').find((line) => line.startsWith(`| \`${prefix}${option}\` |`));
      expect(row, `${prefix}${option}`).toBeDefined();
      // A default in words is worded anew.
      if (value && !value.includes(' ')) expect(row).toContain(`| \`${value}\` |`);
    }
  });

  it('of errors are all there', () => {
    const code = readFileSync(resolve(ROOT, 'src/types.ts'), 'utf8');
    const own = /export type ErrorCode =\n {2}\| ServerCode\n(.*?);/s.exec(code)?.[1]?.match(/\w+/g);
    expect(own?.length).toBeGreaterThan(5);
    for (const one of own ?? []) expect(README).toContain(`\n| \`${one}\` |`);
  });
});
